import './base.css';
import './chart.css';
import './console.css';
import './console-table.css';
import './console-dialog.css';
