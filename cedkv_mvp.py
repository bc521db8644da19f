"""``python -m cedkv_mvp``: the name the project's plan uses for ``python -m cedkv``."""

from cedkv.cli.environment import explained_imports

with explained_imports():
    from cedkv.cli.app import main
    from cedkv.cli.click_ext import program

if __name__ == "__main__":
    program(main, "python -m cedkv_mvp")
