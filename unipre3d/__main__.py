"`python -m unipre3d` is the command `unipre3d`."

import sys

from unipre3d.cli import main

if __name__ == "__main__":
    sys.exit(main())
