"""The records of the blend gate as bytes and files, `<id in hex>.kvblend`; kvstore.record_files says how."""

from __future__ import annotations

from kvstore.blend_gate import BlendRecord, judge
from kvstore.record_files import RecordFiles

SUFFIX = ".kvblend"


def _contradiction(record: BlendRecord) -> str:
    return "" if record.failures == judge(record.metrics, record.limits) else "it contradicts itself"


_FILES = RecordFiles(BlendRecord, name="blend record", suffix=SUFFIX, contradiction=_contradiction)

pack_record = _FILES.pack
parse_record = _FILES.parse
save = _FILES.save
load_all = _FILES.load_all
