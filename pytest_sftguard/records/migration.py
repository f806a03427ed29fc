"""Reading records of older schemas as records of the current one."""

from __future__ import annotations

from typing import Any

_REFERENCES = {"cut": "batch_split"}
_DEFECTS = {"cut": "truncated"}


def from_schema_1(data: dict[str, Any]) -> dict[str, Any]:
    """Return `data`, a record of schema 1, with the names of schema 2 for its fields and values."""
    data = data | {"schema": 2}
    if isinstance(data.get("device"), dict):
        data["device"] = {"device_type" if k == "kind" else k: v for k, v in data["device"].items()}
    if isinstance(data.get("variant"), str):
        data["variant"] = _REFERENCES.get(data["variant"], data["variant"])
    audit = data.get("supervision")
    if isinstance(audit, dict):
        lists = ("trained_defects", "dataset_defects")
        data["supervision"] = {k: _defects(v) if k in lists else v for k, v in audit.items()}
    return data


def _defects(defects: Any) -> Any:
    if not isinstance(defects, list) or not all(isinstance(d, dict) for d in defects):
        return defects
    renamed = [{"name" if k == "kind" else k: v for k, v in d.items()} for d in defects]
    return [d | ({"name": _DEFECTS[d["name"]]} if d.get("name") in _DEFECTS else {}) for d in renamed]
