# SPDX-License-Identifier: Apache-2.0
"""The page plan, pure: which pages a request holds and what is in them."""
