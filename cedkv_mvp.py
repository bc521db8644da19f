"""``python -m cedkv_mvp``: the name the project's plan uses for ``python -m cedkv``."""

from cedkv.cli import main

if __name__ == "__main__":
    main(prog_name="python -m cedkv_mvp")
