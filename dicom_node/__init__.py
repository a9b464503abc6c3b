"""A DICOM-native integration node: C-STORE in, SEG and Structured Report out."""

__version__ = "0.1.0"
