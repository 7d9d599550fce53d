"""What prune and merge share: budgets, protection, decisions, and the plan that cuts experts and
everything counted with them.
"""
