"""The command `qlora-kit`, and `python -m qlora_kit`."""


def main() -> int:
    """Run the command line; Ctrl-C is heard while the first modules are imported too."""
    try:
        from qlora_kit.cli import verbs

        return verbs.main()
    except KeyboardInterrupt:
        import sys

        print("stopped", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
