"""`python -m bfsys`: the console command `bfsys`."""

if __name__ == "__main__":
    from bfsys.start import main

    main()
