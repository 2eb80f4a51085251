"""The initialisation study: weight families and scales, on real data. Needs ``fastdeq[study]``."""
