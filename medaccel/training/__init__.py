# SPDX-License-Identifier: Apache-2.0
"""What the pipelines' trainings share: Lightning set up so that a killed run ends with the same weights.

They are the same bits where the number of threads and the processor's instruction set are the same: torch's
convolutions round differently between those.

`fit` trains; `sampler` numbers the items, so that each is the same whenever it is drawn; `ranks` is for `torchrun`;
`memory` says what a pipeline expects to need.
"""
