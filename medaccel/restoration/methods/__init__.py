# SPDX-License-Identifier: Apache-2.0
"""The restoration methods behind one interface, `medaccel.restoration.methods.base.Method`."""
