"""extend: a mixture of experts with more experts than before."""
