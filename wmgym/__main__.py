"""`python -m wmgym`; with several processes, `torchrun --nproc-per-node N -m wmgym train ...`."""

from wmgym.cli import main

if __name__ == "__main__":
    main()
