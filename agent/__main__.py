"""`python -m agent`: the `turntrace` command without its script."""

from agent.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
