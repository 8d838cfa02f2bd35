"""Random row-by-row programs by the thousand: python tests/many_row_programs.py --programs 10000 --processes 8

As many_fuzz.py --kind rows: counts what was right, wrong, crashed, rewritten and left; --save DIR keeps what failed.
"""

import sys

from many_fuzz import main

if __name__ == "__main__":
    sys.exit(main("rows"))
