"""The registry: names and dotted paths lead to code, or to a message that says what to write."""

from __future__ import annotations

import sys

import pytest

from pytest_sftguard import invariants, registry
from pytest_sftguard.registry import NotFoundError

PACKAGE = "pytest_sftguard.invariants"


@pytest.mark.parametrize("name", registry.names(PACKAGE))
def test_file_name_is_the_name(name):
    """Every file of the folder holds the class that is called like it."""
    assert registry.load(name, PACKAGE).__name__ == registry.class_name(name)


def test_unknown_name_lists_the_names():
    """The error for an unknown name lists those that there are."""
    with pytest.raises(NotFoundError, match=r"unknown name 'loss_falls': choose from .*raw_loss_finite"):
        registry.load("loss_falls", PACKAGE)


@pytest.mark.parametrize(
    ("path", "wording"),
    [
        pytest.param("no_colon", "not a dotted path: write module:object", id="no-colon"),
        pytest.param(":f", "not a dotted path", id="no-module"),
        pytest.param("json:", "not a dotted path", id="no-object"),
        pytest.param("absent_module:f", "cannot be imported: ModuleNotFoundError.*sys.path", id="absent-module"),
        pytest.param("raises_on_import:f", "cannot be imported: ZeroDivisionError", id="raises-on-import"),
        pytest.param("..relative:f", "cannot be imported: TypeError", id="relative"),
        pytest.param("json:absent", "module json has no absent", id="absent-object"),
        pytest.param("json:loads.absent", "module json has no loads.absent", id="absent-attribute"),
    ],
)
def test_path_that_leads_nowhere(tmp_path, monkeypatch, path, wording):
    """The error quotes the path and says where it ends."""
    (tmp_path / "raises_on_import.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(NotFoundError, match=wording):
        registry.load_path(path)


def test_path_leads_to_an_object():
    """A dotted path leads to what the module holds under that name."""
    assert registry.load_path("sys:version_info.major") == sys.version_info.major


@pytest.fixture
def outsider(tmp_path, monkeypatch):
    """A module of invariants that are not ours."""
    (tmp_path / "outsider.py").write_text(
        "class Fine:\n    def check(self, record, reference=None):\n        return iter(())\n"
        "class Needy(Fine):\n    def __init__(self, limit):\n        pass\n"
        "fine = Fine()\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("outsider", None)


@pytest.mark.usefixtures("outsider")
@pytest.mark.parametrize("path", ["outsider:Fine", "outsider:fine"], ids=["class", "instance"])
def test_outsider_is_loaded_beside_ours(path):
    """Somebody else's invariant comes after the built-in ones, made where it is a class."""
    assert type(invariants.load_invariants([path])[-1]).__name__ == "Fine"


@pytest.mark.usefixtures("outsider")
@pytest.mark.parametrize(
    ("path", "wording"),
    [
        pytest.param("outsider:number", "is no invariant: it has no check", id="no-check"),
        pytest.param("outsider:Needy", "cannot be made: TypeError.*limit", id="needs-arguments"),
        pytest.param("outsider:absent", "has no absent", id="absent"),
    ],
)
def test_outsider_that_cannot_be_used(path, wording):
    """The error says why the object is no invariant."""
    with pytest.raises(NotFoundError, match=wording):
        invariants.load_invariants([path])
