"""``python -m cedkv``, and the command ``cedkv`` that an installed package has."""

from cedkv.cli.environment import explained_imports

with explained_imports():
    from cedkv.cli.app import main
    from cedkv.cli.click_ext import program


def script() -> None:
    """Run the command ``cedkv``."""
    program(main, "cedkv")


if __name__ == "__main__":
    program(main, "python -m cedkv")
