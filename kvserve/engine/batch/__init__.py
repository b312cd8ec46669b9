# SPDX-License-Identifier: Apache-2.0
"""The host's view of a scheduled batch: page tables, and rows for the kernels."""
