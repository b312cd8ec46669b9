# SPDX-License-Identifier: Apache-2.0
"""Quality measurements: what policies lose, and the budget that a model can bear."""
