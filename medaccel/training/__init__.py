# SPDX-License-Identifier: Apache-2.0
"""Trains the pipelines' networks with Lightning, set up so that a killed run ends with the same weights.

The weights have the same bits if the number of threads and the processor's instruction set are the same: torch's
convolutions round differently otherwise.

`fit` trains; `sampler` numbers the items, so that each is the same whenever it is drawn; `ranks` is for `torchrun`;
`memory` says what a pipeline expects to need.
"""
