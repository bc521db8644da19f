"""``mlflow run . -e ablate_selector``: every ``-P name=value`` arrives here as ``--name value``."""

from cedkv.cli import comparison_command
from cedkv.commands import program

main = comparison_command("ablate_selector")

if __name__ == "__main__":
    program(main, "ablate_selector")
