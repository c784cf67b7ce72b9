# SPDX-License-Identifier: Apache-2.0
"""Digital phantoms of PET and CT, with their labels."""
