import './base.css';
import './chart.css';
import './console.css';
