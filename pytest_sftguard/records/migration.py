"""Records of older schemas, read as records of today's."""

from __future__ import annotations

from typing import Any

_REFERENCES = {"cut": "batch_split"}
_DEFECTS = {"cut": "truncated"}


def from_schema_1(data: dict[str, Any]) -> dict[str, Any]:
    """Return `data`, a record of schema 1, with the names that schema 2 gives to its fields and values."""
    data = data | {"schema": 2}
    if isinstance(data.get("device"), dict):
        data["device"] = {"device_type" if k == "kind" else k: v for k, v in data["device"].items()}
    if isinstance(data.get("variant"), str):
        data["variant"] = _REFERENCES.get(data["variant"], data["variant"])
    audit = data.get("supervision")
    if isinstance(audit, dict):
        named = {k: _defects(v) if k in ("trained_defects", "dataset_defects") else v for k, v in audit.items()}
        data["supervision"] = named
    return data


def _defects(defects: Any) -> Any:
    if not isinstance(defects, list) or not all(isinstance(d, dict) for d in defects):
        return defects
    renamed = [{"name" if k == "kind" else k: v for k, v in d.items()} for d in defects]
    return [d | ({"name": _DEFECTS[d["name"]]} if d.get("name") in _DEFECTS else {}) for d in renamed]
