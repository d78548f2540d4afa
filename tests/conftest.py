"""One thread: the models are tiny, and contention between threads costs more than it gives.

No test fails because the machine was busy: property tests have no deadline.
"""

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile(
    "patient", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("patient")
