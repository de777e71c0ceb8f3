"""What people and files get wrong: cases as data, for test_bad_input.

Words and files may name `{at}`, the folder of the case, and `{good}`, a folder of valid things:
tiny.yaml, text.txt, plan.json, run/checkpoints/last.ckpt, run/tokenizer/ and pretrained/.
"""

from tests.bad_input.case import Case
from tests.bad_input.checkpoints import CHECKPOINTS
from tests.bad_input.configurations import HOSTILE, YAML
from tests.bad_input.folders import FOLDERS
from tests.bad_input.places import PLACES, REST
from tests.bad_input.plans import PLANS
from tests.bad_input.texts import DATA
from tests.bad_input.words import BUDGETS, INFEASIBLE, NUMBERS, USAGE

__all__ = ["CASES", "Case"]

CASES = (
    *(*USAGE, *BUDGETS, *INFEASIBLE, *NUMBERS, *YAML, *HOSTILE, *DATA, *PLANS),
    *(*CHECKPOINTS, *FOLDERS, *PLACES, *REST),
)
