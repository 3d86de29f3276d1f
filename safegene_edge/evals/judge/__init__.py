"""Did the model refuse? One verdict for a prompt and its completion.

verdict    the rules, and `judge` itself    model    the linear model that decides with them
phrases    what a sentence does             normalise    text made comparable
"""

from __future__ import annotations

from .verdict import JUDGE_VERSION as JUDGE_VERSION
from .verdict import LABELS as LABELS
from .verdict import Label as Label
from .verdict import Verdict as Verdict
from .verdict import features as features
from .verdict import judge as judge
from .verdict import judge_sha256 as judge_sha256
