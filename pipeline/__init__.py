"""flsep.pipeline"""
