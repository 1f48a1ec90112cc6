"""Run lctrain's command line with a fault planted in the order of its batches.

python planted.py {duplicate,skip} STEP train model=tiny ...

duplicate: step STEP (counted from 1) gets the samples of the step before it once more. skip: from step STEP on, every step gets
the samples of the step after it.
"""

import sys

from lctrain.data.loader import Loader


def plant(what: str, at: int) -> None:
    prepare = Loader._prepare

    def planted(self: Loader, step: int):
        number = step + 1
        if what == "duplicate" and number == at:
            batch = prepare(self, step - 1)
        elif what == "skip" and number >= at:
            batch = prepare(self, step + 1)
        else:
            return prepare(self, step)
        return type(batch)(step, step * self._trainer.global_batch, batch.micro_batches, batch.digest)

    Loader._prepare = planted


if __name__ == "__main__":
    what, at = sys.argv[1:3]
    del sys.argv[1:3]
    plant(what, int(at))

    from lctrain.cli import main

    sys.exit(main())
