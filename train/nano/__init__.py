"""The recipe of nano, the embedded model: trained from nothing on drawn scenes."""
