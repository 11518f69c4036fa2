"""`python -m agent`: the `turntrace` command without its script."""

from agent.entry import main

if __name__ == "__main__":
    main()
