"""``mlflow run . -e compare_positioning``: every ``-P name=value`` arrives here as ``--name value``."""

from cedkv.cli.environment import explained_imports

with explained_imports():
    from cedkv.cli.app import comparison_command
    from cedkv.cli.click_ext import program

main = comparison_command("compare_positioning")

if __name__ == "__main__":
    program(main, "compare_positioning")
