"""`python -m bfsys.checkpoint`, as `bfsys checkpoint`."""

if __name__ == "__main__":
    from bfsys.start import run_as

    run_as("checkpoint", "python -m bfsys.checkpoint")
