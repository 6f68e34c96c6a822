"""``python -m rlhf_jax PROGRAM FLAGS``, the same as the command ``rlhf-jax``."""

from rlhf_jax.run.programs import main

if __name__ == "__main__":
    main()
