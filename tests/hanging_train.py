"""train.py whose encoder hangs for ever on the samples named in $HANG, and notes its process in a file in $PIDS."""

import os
import sys
import time
from pathlib import Path

import video.prompt


class Encoder(video.prompt.PromptEncoder):
    def __call__(self, sample, control=None):
        if sample.key in os.environ["HANG"].split():
            whole, part = (Path(os.environ["PIDS"], sample.key + end) for end in ("", ".part"))
            part.write_text(str(os.getpid()))
            part.rename(whole)
            while True:
                time.sleep(60)
        return super().__call__(sample, control)


if __name__ == "__main__":
    video.prompt.PromptEncoder = Encoder  # before anything imports it by name
    import train

    sys.exit(train.main())
