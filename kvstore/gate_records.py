"""The records of codecs as bytes and files, `<id in hex>.kvgate`; kvstore.record_files says how."""

from __future__ import annotations

from kvstore.gate import GateRecord, judge
from kvstore.record_files import RecordFiles

SUFFIX = ".kvgate"


def _contradiction(record: GateRecord) -> str:
    if any(previous.level >= result.level for previous, result in zip(record.levels, record.levels[1:], strict=False)):
        return "levels are not in order"
    for result in record.levels:
        if result.failures != judge(result.metrics, record.limits):
            return f"it contradicts itself at level {result.level}"
    return ""


_FILES = RecordFiles(GateRecord, name="gate record", suffix=SUFFIX, contradiction=_contradiction)

pack_record = _FILES.pack
parse_record = _FILES.parse
save = _FILES.save
load_all = _FILES.load_all
