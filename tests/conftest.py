"""What holds for every test: one torch thread, since the networks are tiny and threads on a busy machine wait for each other."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
