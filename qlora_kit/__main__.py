"""`python -m qlora_kit`."""

from qlora_kit.cli.verbs import main

if __name__ == "__main__":
    raise SystemExit(main())
