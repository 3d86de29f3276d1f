"""A safety gene by forward passes alone.

samples     prompts and the answers that are wanted
teachers    an aligned model, or the target itself under a safety system prompt
fit         all layers in one pass; `solve`: one tensor
run         the whole of it
"""

from .run import learn as learn
from .settings import LearnSettings as LearnSettings
