# SPDX-License-Identifier: Apache-2.0
"""Quality measurements: long texts, hidden facts and how well answers find them."""
