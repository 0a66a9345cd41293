"""The paper's user study (appendix G): which of two methods' masks is more precise, asked of people."""
