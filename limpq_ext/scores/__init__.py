"""What bits are worth to every layer, as `Indicators` that a search takes.

`one_at_a_time`, `second_order`, `traces` and `statistics` measure a float network on a few batches;
`subject` is the network that they switch quantizers on in. Imports training, conversion, nn and
values. Begin with `one_at_a_time`, the plainest.
`second_order` and `one_at_a_time` each have a score, measured on a float network and a few batches;
`methods` lists them; `subject` is the network that they switch quantizers on in. `measure` measures
policies, `check` says by it what scores are worth, and `refine` betters a policy. Imports
allocation, training, conversion, nn and values. Begin with `one_at_a_time`, the plainest.
"""

from limpq_ext.scores.analysis import LayerwiseAnalysis as LayerwiseAnalysis
from limpq_ext.scores.analysis import analyse as analyse
`second_order` and `one_at_a_time` each have a score, measured on a float network and a few batches;
`subject` is the network that they switch quantizers on in. `learned` is LIMPQ's joint training.
Imports joint, training, conversion, nn and values. Begin with `one_at_a_time`, the plainest.
"""

from limpq_ext.scores.learned import learned as learned
from limpq_ext.scores.learned import learned_by as learned_by
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
