"""What bits are worth to every layer, as `Indicators` that a search takes, and whether it is true.

`one_at_a_time`, `second_order`, `loss_aware`, `traces`, `statistics`, `relevance` and `learned`
have the scores, which `methods` lists; `subject` is the network that they switch quantizers on in.
`measure` says what a policy loses, `check` by it what scores are worth, `refine` betters a policy.
Imports joint, allocation, training and what is below. Begin with `one_at_a_time`, the plainest.
"""

from limpq_ext.scores.analysis import LayerwiseAnalysis as LayerwiseAnalysis
from limpq_ext.scores.analysis import analyse as analyse
from limpq_ext.scores.learned import learned as learned
from limpq_ext.scores.learned import learned_by as learned_by
from limpq_ext.scores.loss_aware import loss_aware as loss_aware
from limpq_ext.scores.one_at_a_time import layerwise as layerwise
from limpq_ext.scores.pairs import interactions as interactions
from limpq_ext.scores.pairs import products as products
from limpq_ext.scores.relevance import relevance as relevance
from limpq_ext.scores.relevance import relevance_sensitivity as relevance_sensitivity
from limpq_ext.scores.second_order import fisher as fisher
from limpq_ext.scores.second_order import gradient as gradient
from limpq_ext.scores.statistics import activation_variance as activation_variance
from limpq_ext.scores.statistics import weight_error as weight_error
from limpq_ext.scores.traces import hessian as hessian
from limpq_ext.scores.traces import lampq as lampq
