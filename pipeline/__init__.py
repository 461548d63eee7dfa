"""likelihood-lab: do two loss formulations train the same model?"""
