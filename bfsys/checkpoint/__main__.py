"""`python -m bfsys.checkpoint`, as `bfsys checkpoint`."""

if __name__ == "__main__":
    from bfsys.start import main

    main("checkpoint", "python -m bfsys.checkpoint")
