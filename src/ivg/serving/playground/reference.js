// The page /reference: nothing but its theme.

import { startTheme } from "./theme.js";

startTheme();
