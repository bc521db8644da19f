"""Registries: four ways to be found, imported only when asked for, and errors that name what is wrong."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cedkv.core.errors import ConfigError
from cedkv.core.registry import Registry, build


class Animal:
    """What is registered here."""


class Cat(Animal):
    """One of them."""


HERE = __name__


def registry(**builtin: str) -> Registry[Any]:
    return Registry("animal", "cedkv.test_animals", builtin, base=f"{HERE}:Animal")


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed distribution with an entry point ``dog`` that works and one, ``unicorn``, that does not."""
    (tmp_path / "dogs.py").write_text(f"from {HERE} import Animal\nclass Dog(Animal): pass\n")
    info = tmp_path / "dogs-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dogs\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text("[cedkv.test_animals]\ndog = dogs:Dog\nunicorn = dogs:Unicorn\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_built_in_ones_come_first_and_are_imported_when_asked_for() -> None:
    animals = registry(cat=f"{HERE}:Cat", ghost="no_such_module:Ghost")
    assert animals.names() == ["cat", "ghost"]
    assert animals.check("ghost") == "ghost"
    assert animals.get("cat") is Cat
    assert animals.provider("cat") is None
    with pytest.raises(ConfigError, match="animal 'ghost' cannot be imported from no_such_module:Ghost: ModuleNotFoundError"):
        animals.get("ghost")


def test_an_entry_point_is_found_with_its_distribution(distribution: Path) -> None:
    animals = registry(cat=f"{HERE}:Cat")
    assert animals.names() == ["cat", "dog", "unicorn"]
    assert animals.external() == ["dog", "unicorn"]
    assert animals.get("dog").__name__ == "Dog"
    assert animals.provider("dog") == "dogs 1.5"
    with pytest.raises(ConfigError, match="'unicorn' cannot be imported from dogs:Unicorn: AttributeError"):
        animals.get("unicorn")
    with pytest.raises(ConfigError, match="'dog' is registered already"):
        animals.register("dog")


def test_an_entry_point_may_name_extras_and_nested_classes(distribution: Path) -> None:
    entry_points = distribution / "dogs-1.5.dist-info" / "entry_points.txt"
    entry_points.write_text("[cedkv.test_animals]\ndog = dogs:Dog [bark]\npuppy = dogs:Kennel.Puppy\n")
    with (distribution / "dogs.py").open("a") as module:
        module.write("class Kennel:\n    class Puppy(Animal): pass\n")
    sys.modules.pop("dogs", None)
    animals = registry()
    assert [animals.get(name).__name__ for name in ("dog", "puppy")] == ["Dog", "Puppy"]


def test_a_reference_and_a_decorator() -> None:
    animals = registry()
    assert animals.check(f"{HERE}:Cat") == f"{HERE}:Cat"
    assert animals.get(f"{HERE}:Cat") is Cat
    assert animals.provider(f"{HERE}:Cat") == HERE

    @animals.register("lion")
    class Lion(Animal):
        pass

    assert animals.get("lion") is Lion
    assert animals.names() == ["lion"]
    with pytest.raises(ConfigError, match="animal 'lion' is registered already"):
        animals.register("lion")
    with pytest.raises(ConfigError, match="'a lion' is no identifier"):
        animals.register("a lion")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cta", "no animal is named 'cta'; did you mean 'cat'?"),
        ("zebra", "no animal is named 'zebra'; known: cat"),
        ("", "no animal is named ''"),
        ("no_such_module:Cat", "cannot be imported from no_such_module:Cat"),
        (f"{HERE}:Dog", "AttributeError"),
        (f"{HERE}:registry", "not a class derived from"),
        ("os:system", "not a class derived from"),
        ("x y:z", "no animal is named 'x y:z'"),
    ],
)
def test_what_is_not_there_is_rejected_by_name(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        registry(cat=f"{HERE}:Cat").check(name)
    assert message in str(caught.value)


def test_functions_are_registered_without_a_base() -> None:
    sizes: Registry[Any] = Registry("size", "cedkv.test_sizes", {"small": f"{HERE}:registry"})
    assert sizes.get("small") is registry
    with pytest.raises(ConfigError, match="is a str, not a function"):
        sizes.get(f"{HERE}:HERE")


@dataclass(frozen=True)
class Options:
    """Parameters of something."""

    size: int
    name: str = "x"

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError("size must not be negative")


def test_parameters_are_those_of_the_class() -> None:
    assert build(Options, {"size": 3}, "select.params") == Options(3)
    assert build(Options, {"size": 3, "name": "y"}, "select.params") == Options(3, "y")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "select.params: Options needs size; set select.params.size"),
        ({"sise": 1}, "select.params: Options has no parameter 'sise'; did you mean 'size'?"),
        ({"size": "big"}, "select.params.size: input should be a valid integer"),
        ({"size": -1}, "size must not be negative"),
    ],
)
def test_parameters_that_do_not_fit_are_rejected(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Options, params, "select.params")
    assert message in str(caught.value)


def test_this_module_is_imported_under_its_name() -> None:
    """References above name it; under another name they would test another class."""
    assert sys.modules[HERE].Animal is Animal


def test_an_error_of_another_package_names_it(distribution: Path) -> None:
    animals = registry(cat=f"{HERE}:Cat")
    message = r"animal 'dog' of dogs 1.5 raised KeyError: 'bone' \(sample on-3\); .*--debug"
    with pytest.raises(ConfigError, match=message) as raised, animals.errors_named("dog", "sample on-3"):
        raise KeyError("bone")
    assert isinstance(raised.value.__cause__, KeyError)
    with pytest.raises(KeyError), animals.errors_named("cat"):
        raise KeyError("a defect of this package's own")
    with pytest.raises(ConfigError, match=r"^said already$"), animals.errors_named("dog"):
        raise ConfigError("said already")


@pytest.mark.parametrize(
    ("builtin", "message"),
    [
        ({"dog": f"{HERE}:Cat"}, r"dogs 1\.5 names its animal dog, as cedkv itself does: one of the two would be left out"),
        ({}, "names its animal dog, as .* does"),
    ],
)
def test_a_name_that_two_bring_is_rejected(builtin: dict[str, str], message: str, distribution: Path) -> None:
    other = distribution / "wolves-2.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: wolves\nVersion: 2.0\n")
    (other / "entry_points.txt").write_text(
        "[cedkv.test_animals]\n" + ("dog = dogs:Dog\n" if not builtin else "wolf = dogs:Dog\n")
    )
    with pytest.raises(ConfigError, match=message):
        registry(**builtin).names()
