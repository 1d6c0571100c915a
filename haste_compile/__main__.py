"""``python -m haste_compile`` is the command ``haste``."""

from haste_compile.cli import main

if __name__ == "__main__":
    main()
