"""What all tests share."""

import torch

# A core for each worker. And a copy of a process that has used torch's pool of threads waits for that pool for ever,
# so nothing could be forked from a worker.
torch.set_num_threads(1)
