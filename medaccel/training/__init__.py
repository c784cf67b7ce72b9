# SPDX-License-Identifier: Apache-2.0
"""What the pipelines' trainings share: Lightning set up so that a killed run ends with the same weights.

`fit` trains; `sampler` numbers the items, so that each is the same whenever it is drawn; `ranks` is for `torchrun`.
"""
