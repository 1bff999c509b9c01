"""The batches that travel between the parts."""

from lit_rlhf.types.batches import CompletionBatch as CompletionBatch
from lit_rlhf.types.batches import Experience as Experience
from lit_rlhf.types.batches import PreferenceBatch as PreferenceBatch
from lit_rlhf.types.batches import PromptBatch as PromptBatch
from lit_rlhf.types.batches import Rollout as Rollout
from lit_rlhf.types.batches import Row as Row
from lit_rlhf.types.batches import Rows as Rows
from lit_rlhf.types.batches import SamplingConfig as SamplingConfig
from lit_rlhf.types.batches import ScoredRollout as ScoredRollout
from lit_rlhf.types.batches import concatenate as concatenate
from lit_rlhf.types.batches import pad_left as pad_left
from lit_rlhf.types.batches import pad_right as pad_right
from lit_rlhf.types.dicts import GivenCompletions as GivenCompletions
from lit_rlhf.types.dicts import from_dict as from_dict
