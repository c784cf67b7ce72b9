# SPDX-License-Identifier: Apache-2.0
"""Makes digital phantoms of PET and CT, with their labels."""
